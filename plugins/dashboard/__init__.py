"""Serve the live page at `/`: who is here, what happens, and how it has been. Teaches: routes.

The page in `static/` is plain ES modules, served as they lie there; it uses what docs/websocket-api.md
promises to any dashboard. `vendor/` holds the Socket.IO client and the chart library, which
`make dashboard` fetches in the versions that package-lock.json names.
"""

from pathlib import Path

import tornado.web

from spywatcher import Spy, route

HERE = Path(__file__).parent
TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
VENDOR = ("socket.io.js", "uplot.css", "uplot.js")
NOT_BUILT = "the page at / is not built: `make dashboard` fetches what it needs (with npm)"
#: Nothing from elsewhere: neither code nor pictures, so guilds have no icons from Discord's CDN.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Always asked for again, answered with 304 (Tornado's ETag): a changed file is seen at once.
    "Cache-Control": "no-cache",
}


def setup(spy: Spy) -> None:
    if not is_built():
        spy.log.info(NOT_BUILT)


def is_built() -> bool:
    return all((HERE / "vendor" / name).is_file() for name in VENDOR)


class File(tornado.web.RequestHandler):
    """One of the page's files; what a request names is looked up, never joined to a path."""

    def set_default_headers(self) -> None:
        for name, value in HEADERS.items():
            self.set_header(name, value)

    def send(self, name: str) -> None:
        paths = {
            path.name: path for part in ("static", "vendor") for path in (HERE / part).glob("*")
        }
        if name not in paths or paths[name].suffix not in TYPES:
            raise tornado.web.HTTPError(404)
        self.set_header("Content-Type", TYPES[paths[name].suffix])
        self.finish(paths[name].read_bytes())


@route(r"/")
class Page(File):
    def get(self) -> None:
        if is_built():
            self.send("index.html")
        else:
            self.set_status(503)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(f"SpyWatcher runs; {NOT_BUILT}.\n")

    head = get


@route(r"/dashboard/([a-z0-9.-]+)")
class Part(File):
    def get(self, name: str) -> None:
        self.send(name)

    head = get
