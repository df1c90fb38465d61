"""The page's figures, a file for each: records in, what plotly draws out; no plotly is needed."""
