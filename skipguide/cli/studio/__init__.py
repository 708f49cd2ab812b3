"""The studio: a page in the browser to compare settings in. Started by `skipguide studio`."""
