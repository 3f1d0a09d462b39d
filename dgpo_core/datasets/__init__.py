"""Questions and corpora in the field's formats, and the embedded world."""
