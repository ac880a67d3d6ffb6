"""The package `tests` of Transformers: its source distribution's modules, and stand-ins for those that it leaves out.

The distribution comes first, so that a module which a later version carries is taken from there.
"""

import os

__path__ = [os.path.join(os.environ["TRANSFORMERS_SDIST"], "tests"), *__path__]
