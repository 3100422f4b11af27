from persistence.testing.concurrency import *
