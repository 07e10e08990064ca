from spywatcher import every


@every(60)
def broken(): ...
