"""The options of ``vgpo train``: TRL's parser over the settings of a run, its files of settings, and its help."""
