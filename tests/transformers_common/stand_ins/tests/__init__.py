"""The package `tests` of Transformers: its source distribution's modules, and stand-ins for those that it lacks.

The distribution comes first, so that modules of a later version replace the stand-ins.
"""

import os

__path__ = [os.path.join(os.environ["TRANSFORMERS_SDIST"], "tests"), *__path__]
