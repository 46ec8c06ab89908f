"""Reports on runs: tables in Markdown, and one self-contained HTML page."""
