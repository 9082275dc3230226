"""Errors that a user of the trainers can mend: their commands end in its message."""

from mmjax.convert import CheckpointError
from mmjax.engine import RequestError
from mmjax.errors import ConfigError
from mmjax.sharding import ShardingError
from mmjax.tokenizer import TokenizerError

# Any other error is a bug, whose traceback has to be seen.
USER_ERRORS = (ConfigError, CheckpointError, RequestError, ShardingError, TokenizerError)
