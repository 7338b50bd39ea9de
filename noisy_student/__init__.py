__version__ = "0.1.0"

from .docstrings import document_on_import

document_on_import(__name__) # the comments beside parameters become part of what help() shows
