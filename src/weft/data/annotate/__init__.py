"""Questions about documents that a chat model answers, or rules: one role a file."""
