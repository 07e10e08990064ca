from spywatcher import Payload


class Broken(Payload):
    who: "Somebody"
