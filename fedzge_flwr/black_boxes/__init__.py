"""Black boxes of other people's models: subclass `ClassifierBlackBox`, or take one of these.

Nothing is imported before it is asked for: scikit-learn and ONNX Runtime are extras.
"""

from __future__ import annotations
