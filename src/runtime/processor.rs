//! What the processor multiplies fast, as far as it decides which precision pays there.

/// A part of the instruction set that kernels of ONNX Runtime or of a plugin are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Extension {
    Avx2,
    Avx512,
    AvxVnni,
    Avx512Vnni,
    Avx512Bf16,
    AmxBf16,
    AmxInt8,
    DotProd,
    I8mm,
    Bf16,
}

/// The extensions that a processor has and its operating system lets programs use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processor {
    extensions: Vec<Extension>,
}

impl Processor {
    /// The one that this runs on.
    pub fn detect() -> Self {
        Self { extensions: detected() }
    }

    /// Whether it has this.
    pub fn has(&self, extension: Extension) -> bool {
        self.extensions.contains(&extension)
    }

    /// Whether plugins find instructions for bfloat16 here. ONNX Runtime's own kernels use none on x86-64.
    pub fn has_bfloat16(&self) -> bool {
        [Extension::Avx512Bf16, Extension::AmxBf16, Extension::Bf16].into_iter().any(|bf16| self.has(bf16))
    }

    /// Whether products of unsigned and signed 8-bit numbers are added in 16 bits, two at a time: too few for signed numbers beyond ±64.
    pub fn saturates(&self) -> bool {
        cfg!(target_arch = "x86_64") && ![Extension::AvxVnni, Extension::Avx512Vnni].into_iter().any(|vnni| self.has(vnni))
    }
}

/// Extensions by their names, the widest last; `portable` where there is none.
impl std::fmt::Display for Processor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = self.extensions.iter().map(|extension| extension.name()).collect();
        f.write_str(if names.is_empty() { "portable" } else { "" })?;
        f.write_str(&names.join(" "))
    }
}

impl Extension {
    fn name(self) -> &'static str {
        match self {
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::AvxVnni => "avx-vnni",
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::AmxBf16 => "amx-bf16",
            Self::AmxInt8 => "amx-int8",
            Self::DotProd => "dotprod",
            Self::I8mm => "i8mm",
            Self::Bf16 => "bf16",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn detected() -> Vec<Extension> {
    use std::arch::is_x86_feature_detected as detected;
    let known = [
        (Extension::Avx2, detected!("avx2")),
        (Extension::Avx512, detected!("avx512f")),
        (Extension::AvxVnni, detected!("avxvnni")),
        (Extension::Avx512Vnni, detected!("avx512vnni")),
        (Extension::Avx512Bf16, detected!("avx512bf16")),
    ];
    let found: Vec<Extension> = known.into_iter().filter(|(_, there)| *there).map(|(extension, _)| extension).collect();
    // An emulator shows the flags of its host; whoever has tiles has VNNI.
    let tiles = if found.contains(&Extension::Avx512Vnni) {
        tiles(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
    } else {
        Vec::new()
    };
    found.into_iter().chain(tiles).collect()
}

/// The standard library asks for tiles in nightly builds only; Linux lists them where a program may use them.
#[cfg(target_arch = "x86_64")]
fn tiles(cpuinfo: &str) -> Vec<Extension> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let known = [(Extension::AmxBf16, "amx_bf16"), (Extension::AmxInt8, "amx_int8")];
    known.into_iter().filter(|(_, flag)| flags.split_whitespace().any(|word| word == *flag)).map(|(tile, _)| tile).collect()
}

#[cfg(target_arch = "aarch64")]
fn detected() -> Vec<Extension> {
    use std::arch::is_aarch64_feature_detected as detected;
    let known =
        [(Extension::DotProd, detected!("dotprod")), (Extension::I8mm, detected!("i8mm")), (Extension::Bf16, detected!("bf16"))];
    known.into_iter().filter(|(_, there)| *there).map(|(extension, _)| extension).collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn detected() -> Vec<Extension> {
    Vec::new()
}
