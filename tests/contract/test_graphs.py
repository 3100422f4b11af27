from persistence.testing.graphs import *
