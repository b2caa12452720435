"""The exceptions a user can meet, one small tree.

Every message says what was seen, what was expected and what to do, in one paragraph. The command
line prints these without a traceback and exits 1; anything else is a bug of ours and keeps its
traceback.

    AbliteratorError
     ├── RecipeError           the recipe, or a flag, says something that cannot be done
     ├── PromptError           a prompt set is empty, unreadable, or overlaps another
     ├── UnsupportedModel      the anatomy does not know this architecture, tensor or storage format
     ├── FileError             a file is missing, damaged, unreadable, or has no room
     │    └── CheckpointError  a checkpoint folder is damaged, incomplete, unreadable or full
     │         └── HubUnreachable  a model is not on this machine, and the Hub does not answer
     ├── DirectionError        activations or directions that make no subspace
     ├── OutputError           the output folder is not ours, or there is no room for it
     ├── GenerationError       a model could not be loaded, or could not answer
     ├── WorkerError           workers, or the cluster that they run on, cannot be used
     ├── ServerError           a model server, or the cache of its replies, cannot be used
     ├── JudgeError            answers could not be judged
     ├── PairsError            contrast pairs could not be made as asked
     ├── BenchmarkError        a benchmark task is unknown, unreachable or cannot be compared
     ├── QuantizationError     a model could not be quantised, or a tool for it is not installed
     └── PublishError          a checkpoint is not fit to be published, or the Hub refused it
"""


class AbliteratorError(Exception):
    """Base of all errors with a message for the user."""


class RecipeError(AbliteratorError):
    """The recipe, or a flag, says something that cannot be done."""


class PromptError(AbliteratorError):
    """A prompt set is empty, unreadable, or overlaps another."""


class UnsupportedModel(AbliteratorError):
    """The anatomy does not know this architecture, tensor or storage format."""


class FileError(AbliteratorError):
    """A file is missing, damaged, unreadable, or there is no room for it."""


class CheckpointError(FileError):
    """A checkpoint folder is damaged, incomplete, or cannot be read or written."""


class HubUnreachable(CheckpointError):
    """A model is not on this machine, and the Hub cannot be reached."""


class DirectionError(AbliteratorError):
    """Activations or directions that no subspace can be made of."""


class OutputError(AbliteratorError):
    """The output folder is not ours, or there is no room for it."""


class GenerationError(AbliteratorError):
    """A model could not be loaded, or could not answer."""


class WorkerError(AbliteratorError):
    """Workers, or the cluster that they run on, cannot be used."""


class ServerError(AbliteratorError):
    """A model server, or the cache of its replies, cannot be used."""


class JudgeError(AbliteratorError):
    """Answers could not be judged."""


class PairsError(AbliteratorError):
    """Contrast pairs could not be made as asked."""


class BenchmarkError(AbliteratorError):
    """A benchmark task is unknown, unreachable or cannot be compared."""


class QuantizationError(AbliteratorError):
    """A model could not be quantised, or a tool for it is not installed."""


class PublishError(AbliteratorError):
    """A checkpoint is not fit to be published, or the Hub refused it."""
