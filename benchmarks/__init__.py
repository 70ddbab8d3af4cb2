"""One file per question; JSON and Markdown out."""
