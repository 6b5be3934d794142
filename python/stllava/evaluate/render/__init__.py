"""An evaluation for readers.

    terminal   tables of rich                     tables     Markdown and LaTeX
    page       one HTML file, nothing outside it  intervals  the chart in it       notebook   what a cell shows
"""
