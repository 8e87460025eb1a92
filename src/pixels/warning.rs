/// What is wrong with a file whose picture is nevertheless whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PictureWarning {
    /// The end marker is missing or damaged.
    NoEnd,
}

impl std::fmt::Display for PictureWarning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoEnd => "the end of the file is missing or damaged, the picture is whole",
        })
    }
}
