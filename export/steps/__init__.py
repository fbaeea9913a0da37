"""The steps of one export: graphs are captured, merged, translated, rounded and written, and then verified."""
