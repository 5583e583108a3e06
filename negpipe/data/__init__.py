"""The tables that stages hand on: texts, anchors and their namesakes, candidates."""
