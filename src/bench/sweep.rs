//! What a sweep leaves behind: settings that were measured in turns, beside the first of them.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use super::environment::{Load, Machine};
use super::report::{Report, short};
use super::statistics::Ratio;
use super::turns::{Turn, noise, paired};

/// The name in every document.
pub const SCHEMA: &str = "blip2-sweep";
/// It grows when a field changes its meaning or goes; new fields may come without that.
pub const VERSION: u32 = 1;

/// Settings that were measured in turns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// [`SCHEMA`].
    pub schema: String,
    /// [`VERSION`].
    pub version: u32,
    /// What was typed.
    pub command: Vec<String>,
    /// Seconds since 1970, when it began.
    pub started: u64,
    /// Seconds that it took, warm-up and loading included.
    pub took_s: f64,
    /// Whether all turns of all settings came to their end.
    pub is_complete: bool,
    /// Where.
    pub machine: Machine,
    /// The machine's load before, and at the end.
    pub load: [Load; 2],
    /// The scenario with what all settings have in common, as it was typed.
    pub scenario: Vec<String>,
    /// Turns that each setting was to have.
    pub rounds: usize,
    /// Whether every turn was a process of its own, so that only one held memory at a time.
    pub apart: bool,
    /// By which share the median latency of a setting's turn differs from that of its turn before, in the median over all settings: the
    /// noise floor. None where no setting had two turns.
    pub noise: Option<f64>,
    /// The same of pictures a second.
    pub noise_of_images: Option<f64>,
    /// In the order of their turns. Ratios are to the first.
    pub settings: Vec<Setting>,
}

/// One of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Setting {
    /// All that is varied, such as `threads=2 beams=1`.
    pub name: String,
    /// Option and value of each.
    pub options: Vec<(String, String)>,
    /// Its turns, a round each.
    pub turns: Vec<Turn>,
    /// Of all turns; none where there is no report.
    pub figures: Option<Figures>,
    /// As the sweep's, of this setting alone.
    pub noise: Option<f64>,
    /// Latency divided by the first setting's, below 1 where this one is faster: the mean over rounds of the ratio of medians.
    pub latency: Option<Ratio>,
    /// Pictures a second divided by the first setting's, above 1 where this one does more.
    pub images: Option<Ratio>,
    /// The file of its report, in the folder that was named.
    pub report: Option<String>,
    /// Why it was not measured to the end.
    pub failure: Option<String>,
}

/// The most important of a report's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Median latency, in milliseconds.
    pub p50_ms: f64,
    /// Nine tenths of latencies lie below.
    pub p90_ms: f64,
    /// Pictures a second.
    pub images: f64,
    /// Tokens a second.
    pub tokens: f64,
}

impl Setting {
    /// With the figures of its report.
    pub fn with(self, report: &Report) -> Self {
        let figures = &report.figures;
        let of = &figures.latencies_ms["end_to_end"].percentiles;
        let rates = figures.rates;
        let figures = Figures { p50_ms: of[0].value, p90_ms: of[1].value, images: rates.images, tokens: rates.tokens };
        Self { figures: Some(figures), ..self }
    }

    fn medians(&self) -> Vec<f64> {
        self.turns.iter().map(|turn| turn.median_ms).collect()
    }

    fn rates(&self) -> Vec<f64> {
        self.turns.iter().map(|turn| turn.rates.images).collect()
    }
}

impl Sweep {
    /// Compares the settings with the first, and with themselves.
    pub fn compare(&mut self) {
        let medians: Vec<_> = self.settings.iter().map(Setting::medians).collect();
        let rates: Vec<_> = self.settings.iter().map(Setting::rates).collect();
        self.noise = noise(medians.iter().map(Vec::as_slice));
        self.noise_of_images = noise(rates.iter().map(Vec::as_slice));
        for (i, setting) in self.settings.iter_mut().enumerate() {
            setting.noise = noise([medians[i].as_slice()]);
            if i > 0 {
                setting.latency = paired(&medians[i], &medians[0]);
                setting.images = paired(&rates[i], &rates[0]);
            }
        }
    }

    /// A table for people, in Markdown.
    pub fn markdown(&self) -> String {
        let mut out = String::new();
        self.describe(&mut out).expect("a string takes everything");
        out
    }

    fn describe(&self, out: &mut String) -> std::fmt::Result {
        let how = if self.apart { "each turn a process of its own" } else { "in turns" };
        writeln!(out, "{} settings, {} rounds {how}\n", self.settings.len(), self.rounds)?;
        writeln!(out, "| setting | p50 ms | p90 ms | images/s | tokens/s | latency / first | images/s / first |")?;
        writeln!(out, "|---|---|---|---|---|---|---|")?;
        for (i, setting) in self.settings.iter().enumerate() {
            let cells = setting.figures.map_or_else(
                || "| – | – | – | –".to_owned(),
                |found| {
                    let [p50, p90, images, tokens] = [found.p50_ms, found.p90_ms, found.images, found.tokens].map(short);
                    format!("| {p50} | {p90} | {images} | {tokens}")
                },
            );
            let [latency, images] = [setting.latency, setting.images].map(|ratio| if i == 0 { "1".into() } else { shown(ratio) });
            writeln!(out, "| {} {cells} | {latency} | {images} |", setting.name)?;
        }
        writeln!(out, "\nin brackets the 95 % interval of a ratio; `*`: it leaves no doubt that there is a difference")?;
        self.noise.map_or(Ok(()), |share| {
            writeln!(out, "noise floor: a setting's turn differs from its turn before by {:.1} % in the median", share * 100.0)
        })?;
        if self.is_complete { Ok(()) } else { writeln!(out, "not valid: not all turns came to their end") }
    }
}

/// Whether an interval leaves no doubt that there is a difference.
pub fn is_sure(ratio: &Ratio) -> bool {
    ratio.interval[0] > 1.0 || ratio.interval[1] < 1.0
}

fn shown(ratio: Option<Ratio>) -> String {
    let Some(ratio) = ratio else { return "–".into() };
    let Ratio { value, interval: [low, high] } = ratio;
    format!("{value:.3} ({low:.3}–{high:.3}){}", if is_sure(&ratio) { " *" } else { "" })
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::figures::Rates;
    use super::*;

    fn setting(name: &str, medians: &[f64]) -> Setting {
        let turn = |ms: &f64| Turn {
            median_ms: *ms,
            rates: Rates { queries: 1e3 / ms, images: 1e3 / ms, tokens: 0.0, good: None },
            queries: 10,
        };
        Setting { name: name.into(), turns: medians.iter().map(turn).collect(), ..Setting::default() }
    }

    /// Of settings with these medians.
    pub fn sweep(settings: &[(&str, &[f64])]) -> Sweep {
        let mut found = Sweep {
            schema: SCHEMA.into(),
            version: VERSION,
            command: Vec::new(),
            started: 0,
            took_s: 1.0,
            is_complete: true,
            machine: Machine::default(),
            load: [Load::default(); 2],
            scenario: vec!["single".into()],
            rounds: settings[0].1.len(),
            apart: false,
            noise: None,
            noise_of_images: None,
            settings: settings.iter().map(|(name, medians)| setting(name, medians)).collect(),
        };
        found.compare();
        found
    }

    #[test]
    fn settings_are_compared_with_the_first_and_with_themselves() {
        let found =
            sweep(&[("a", &[100.0, 110.0, 100.0]), ("b", &[80.0, 88.0, 80.5]), ("c", &[101.0, 108.0, 103.0]), ("dead", &[50.0])]);
        let [a, b, c, dead] = &found.settings[..] else { panic!("four") };
        assert_eq!((a.latency, dead.latency, dead.images), (None, None, None));
        let (latency, images) = (b.latency.expect("rounds"), b.images.expect("rounds"));
        assert!((latency.value - 0.8).abs() < 0.01 && is_sure(&latency) && (images.value - 1.25).abs() < 0.01, "{latency:?}");
        assert!(!is_sure(&c.latency.expect("rounds")) && (0.08..0.11).contains(&found.noise.expect("turns")));
        let table = found.markdown();
        assert!(table.contains("| b | – | – | – | – | 0.802 (") && table.contains("noise floor: "), "{table}");
        assert!(table.lines().any(|line| line.starts_with("| dead |") && line.ends_with("| – | – |")), "{table}");
    }

    #[test]
    fn a_sweep_comes_back_from_json() {
        let written = sweep(&[("a", &[1.0, 1.1]), ("b", &[1.0, 1.2])]);
        let json = serde_json::to_string(&written).expect("it is JSON");
        let read: Sweep = serde_json::from_str(&json).expect("it was written here");
        assert_eq!((read.settings.len(), read.markdown()), (2, written.markdown()));
    }
}
