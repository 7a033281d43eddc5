"""Pages that are made of the code: settings, commands, messages. ``make docs`` makes them anew."""
