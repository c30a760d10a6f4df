"""Words on a screen: tables, JSON, pages, charts and files."""
