from .one import ONE
