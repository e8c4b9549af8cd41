"""Floor 3: how one model is spread over ranks beyond ZeRO, an axis per folder; siblings share what lies here."""
