from spywatcher import route


@route("/page")
def page(request): ...
