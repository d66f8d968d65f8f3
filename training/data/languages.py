"""Sentences in languages other than English, for espeak-ng's voices: another rhythm, other mouth shapes."""

from __future__ import annotations

import numpy as np

# Per language: who did it, what they did, to what, where or when. Any row goes with any other.
_WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "de": (
        ("Gestern hat meine Schwester", "Der Bürgermeister hat", "Am Montag haben wir", "Mein Onkel hat",
         "Die junge Ärztin hat", "Vor dem Frühstück habt ihr"),
        ("schöne Bücher", "einen großen Schirm", "zwölf grüne Äpfel", "die kaputte Uhr", "frisches Brot",
         "den alten Teppich"),
        ("auf dem Markt", "hinter der Brücke", "in der Küche", "unter dem Tisch", "am Bahnhof", "im Wald"),
        ("gefunden.", "vergessen.", "verkauft.", "gesehen.", "gemalt.", "mitgebracht."),
    ),
    "fr": (
        ("Hier ma voisine", "Le boulanger", "Lundi matin mon oncle", "La petite fille", "Notre vieux médecin",
         "Après le dîner Pauline"),
        ("a trouvé", "a perdu", "a peint", "a vendu", "nous a montré", "a oublié"),
        ("une jupe bleue", "un bon fromage", "deux beaux chevaux", "la grande horloge", "un parapluie rouge",
         "le journal du soir"),
        ("sous la table.", "devant la gare.", "au bord du fleuve.", "dans le jardin.", "près du pont.", "au marché."),
    ),
    "es": (
        ("Ayer el niño", "La vecina de abajo", "El lunes mi abuelo", "Nuestra profesora", "Por la tarde Manuel",
         "El viejo pescador"),
        ("encontró", "vendió", "pintó", "perdió", "nos mostró", "compró"),
        ("una guitarra azul", "dos libros viejos", "un queso muy bueno", "la llave pequeña", "el reloj roto",
         "muchas manzanas verdes"),
        ("en el mercado.", "junto al puente.", "debajo de la mesa.", "cerca del río.", "en la calle mayor.",
         "antes del desayuno."),
    ),
}  # fmt: skip
LANGUAGES = tuple(_WORDS)


def make_foreign_sentence(language: str, rng: np.random.Generator) -> str:
    """One of 1296 sentences of a language of LANGUAGES, two to three seconds long."""
    return " ".join(str(part[int(rng.integers(len(part)))]) for part in _WORDS[language])
