from persistence.testing.interface import *
