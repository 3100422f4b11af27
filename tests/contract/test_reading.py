from persistence.testing.reading import *
