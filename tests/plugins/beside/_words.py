"""No plugin: what two plugins share."""

HELLO = "hello"
