"""Has the name of a module of the standard library, and needs that module."""

import json

TEXT = json.dumps({"a": 1})
