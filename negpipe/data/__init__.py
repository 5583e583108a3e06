"""The tables passed between stages: texts, anchors and their namesakes, candidates."""
