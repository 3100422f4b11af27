from persistence.testing.writing import *
