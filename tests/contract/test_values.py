from persistence.testing.values import *
