/// What is wrong with a file that Pillow opens nevertheless.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PictureWarning {
    /// The end marker is missing or damaged.
    NoEnd,
    /// A check sum is wrong.
    WrongSum,
    /// The data ends in good order before the last row; what is missing is black.
    RowsMissing,
}

impl std::fmt::Display for PictureWarning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoEnd => "the end of the file is missing or damaged, the picture is whole",
            Self::WrongSum => "a check sum is wrong, the picture is whole",
            Self::RowsMissing => "the last rows are missing, they count as black",
        })
    }
}
