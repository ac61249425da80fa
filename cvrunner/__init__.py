"""cvrunner: does fine-tuning the speech encoder help, by how much, and how certain are we?"""

__version__ = "0.2.0"
