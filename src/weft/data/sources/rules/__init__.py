"""What several sources' records have in common, each rule once: lists side by side, conversations, pairs, steps."""
