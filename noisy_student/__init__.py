__version__ = "0.1.0"

from .docstrings import document_on_import

document_on_import(__name__) # the comments beside parameters become part of what help() shows

from .quiet_imports import quiet_on_import

quiet_on_import('fastai.layers', '`torch.jit.script` is ', after='fastai.torch_core') # which nothing here uses
