"""The documentation site: `python -m demos.site FOLDER`."""
