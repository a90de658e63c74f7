"""`make bench`: how fast each stage trains on this machine, beside peers. Not part of the package."""
