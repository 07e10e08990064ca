from .two import TWO

ONE = 1
