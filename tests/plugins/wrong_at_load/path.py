from tornado.web import RequestHandler

from spywatcher import route


@route("page")
class Page(RequestHandler): ...
