from persistence.testing.conformance import *
