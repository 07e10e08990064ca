from spywatcher import every


@every
def tick(spy): ...
