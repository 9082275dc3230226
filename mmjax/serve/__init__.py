"""`mmjax serve`: an OpenAI-compatible HTTP front on the engine (needs the extra `serve`)."""

from mmjax.serve.app import ServeConfig, create_app
from mmjax.serve.jobs import Served

__all__ = ["ServeConfig", "Served", "create_app"]
