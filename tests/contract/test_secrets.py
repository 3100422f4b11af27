from persistence.testing.secrets import *
