"""Operations with more than one implementation: a plain reference first, faster ones tested against it."""
