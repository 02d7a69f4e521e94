# The same as in Python.
from router.prefix.blocks import Blocks as Blocks
