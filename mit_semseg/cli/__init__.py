"""Command line programs and the web page."""
