//! Who may ask, and how often.

use std::collections::BTreeMap;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use std::time::{Duration, SystemTime};

use governor::clock::{Clock, DefaultClock};
use governor::{DefaultDirectRateLimiter, Quota, RateLimiter};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::ServeError;
use super::traces::Trace;

/// How often it is looked whether the file has changed.
const LOOKING: Duration = Duration::from_secs(1);
/// Shorter ones can be guessed.
const SHORTEST: usize = 16;

/// Somebody who may ask.
#[derive(Clone)]
pub struct Caller {
    /// Tells callers apart; 0 where there are no keys.
    pub owner: u64,
    /// As the file of keys names them.
    pub name: Arc<str>,
    /// Of their requests.
    pub priority: i8,
    /// Whether what is made of their pictures may be kept; a request may say that it may not.
    pub keeps: bool,
    /// Of the request, if it is traced.
    pub trace: Option<Trace>,
    limiter: Option<Arc<DefaultDirectRateLimiter>>,
}

/// The keys that are known, read again when their file changes.
pub struct Keys {
    path: PathBuf,
    /// Requests a second of keys that say nothing else.
    rate: f64,
    known: RwLock<Vec<Known>>,
}

struct Known {
    digest: [u8; 32],
    caller: Caller,
}

/// The file: a table for each caller.
#[derive(Deserialize)]
#[serde(transparent)]
struct KeyFile(BTreeMap<String, Entry>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: String,
    #[serde(default)]
    priority: i8,
    requests_per_s: Option<f64>,
}

impl Caller {
    /// Anybody, where there are no keys.
    pub fn anybody(rate: f64) -> Self {
        Self { owner: 0, name: "anybody".into(), priority: 0, keeps: true, trace: None, limiter: limiter(rate) }
    }

    /// Counts a request; if it is one too many, in how many seconds it will not be.
    pub fn count(&self) -> Result<(), u64> {
        let Some(limiter) = &self.limiter else { return Ok(()) };
        limiter.check().map_err(|until| until.wait_time_from(DefaultClock::default().now()).as_secs_f64().ceil() as u64)
    }
}

impl Keys {
    /// Reads the file, and goes on looking at it on a thread of its own.
    pub fn open(path: &Path, rate: f64) -> Result<Arc<Self>, ServeError> {
        let known = RwLock::new(read(path, rate)?);
        let keys = Arc::new(Self { path: path.into(), rate, known });
        let weak = Arc::downgrade(&keys);
        let mut seen = modified(path);
        std::thread::spawn(move || {
            while let Some(keys) = weak.upgrade() {
                let now = modified(&keys.path);
                if now != seen {
                    seen = now;
                    keys.read_again();
                }
                drop(keys);
                std::thread::sleep(LOOKING);
            }
        });
        Ok(keys)
    }

    /// Who presents this key. It takes as long whoever it is.
    pub fn caller(&self, key: &str) -> Option<Caller> {
        let digest = digest(key);
        let known = self.known.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut found = None;
        for one in known.iter() {
            if bool::from(one.digest.ct_eq(&digest)) {
                found = Some(one.caller.clone());
            }
        }
        found
    }

    /// A file that cannot be read leaves the keys as they are.
    fn read_again(&self) {
        match read(&self.path, self.rate) {
            Ok(known) => {
                tracing::info!(n = known.len(), "keys were read again");
                *self.known.write().unwrap_or_else(std::sync::PoisonError::into_inner) = known;
            }
            Err(error) => tracing::error!(%error, "the keys stay as they were"),
        }
    }
}

fn modified(path: &Path) -> Option<(SystemTime, u64)> {
    let about = std::fs::metadata(path).ok()?;
    Some((about.modified().ok()?, about.len()))
}

fn read(path: &Path, rate: f64) -> Result<Vec<Known>, ServeError> {
    let text = std::fs::read_to_string(path).map_err(|source| ServeError::File { path: path.into(), source })?;
    // What the parser says may show a key.
    let KeyFile(entries) = toml::from_str(&text).map_err(|_| {
        let why = "it must have tables such as `[alice]` with `key`, `priority` and `requests_per_s`".into();
        ServeError::Keys { path: path.into(), why }
    })?;
    entries.into_iter().map(|(name, entry)| entry.known(&name, rate, path)).collect()
}

impl Entry {
    fn known(self, name: &str, rate: f64, path: &Path) -> Result<Known, ServeError> {
        let Self { key, priority, requests_per_s } = self;
        if key.len() < SHORTEST || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            let why = format!("the key of `{name}` needs at least {SHORTEST} characters, all of them visible ASCII");
            return Err(ServeError::Keys { path: path.into(), why });
        }
        let digest = digest(&key);
        // The same for the same name, so that what is kept for somebody outlives a new key.
        let owner = Sha256::digest(name.as_bytes()).first_chunk().map_or(1, |bytes| u64::from_le_bytes(*bytes)).max(1);
        let limiter = limiter(requests_per_s.unwrap_or(rate));
        let caller = Caller { owner, name: name.into(), priority, limiter, ..Caller::anybody(0.0) };
        Ok(Known { digest, caller })
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

/// As many at once as in a second; nothing where there is no limit.
fn limiter(rate: f64) -> Option<Arc<DefaultDirectRateLimiter>> {
    if rate <= 0.0 || !rate.is_finite() {
        return None;
    }
    let at_once = NonZeroU32::new(rate.ceil() as u32).unwrap_or(NonZeroU32::MIN);
    let quota = Quota::with_period(Duration::from_secs_f64(1.0 / rate))?.allow_burst(at_once);
    Some(Arc::new(RateLimiter::direct(quota)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        file
    }

    #[test]
    fn callers_are_known_by_their_keys_alone() {
        let file = file("[alice]\nkey = 'aaaaaaaaaaaaaaaaaaaa'\npriority = 2\n[bob]\nkey = 'bbbbbbbbbbbbbbbbbbbb'\n");
        let keys = Keys::open(file.path(), 0.0).unwrap();
        let alice = keys.caller("aaaaaaaaaaaaaaaaaaaa").unwrap();
        let bob = keys.caller("bbbbbbbbbbbbbbbbbbbb").unwrap();
        assert_eq!((&*alice.name, alice.priority, &*bob.name), ("alice", 2, "bob"));
        assert!(alice.owner != bob.owner && alice.owner != 0);
        for wrong in ["", "aaaaaaaaaaaaaaaaaaa", "AAAAAAAAAAAAAAAAAAAA", "aaaaaaaaaaaaaaaaaaaab"] {
            assert!(keys.caller(wrong).is_none(), "{wrong}");
        }
    }

    #[test]
    fn a_file_that_changes_is_read_again_and_a_broken_one_is_not() {
        let file = file("[a]\nkey = 'aaaaaaaaaaaaaaaaaaaa'\n");
        let keys = Keys::open(file.path(), 0.0).unwrap();
        std::fs::write(file.path(), "[a]\nkey = 'cccccccccccccccccccccccc'\n").unwrap();
        let knows = |key: &str| {
            let until = std::time::Instant::now() + Duration::from_secs(20);
            while keys.caller(key).is_none() && std::time::Instant::now() < until {
                std::thread::sleep(Duration::from_millis(20));
            }
            keys.caller(key).is_some()
        };
        assert!(knows("cccccccccccccccccccccccc") && keys.caller("aaaaaaaaaaaaaaaaaaaa").is_none());
        std::fs::write(file.path(), "[a").unwrap();
        std::thread::sleep(LOOKING * 2);
        assert!(keys.caller("cccccccccccccccccccccccc").is_some());
    }

    #[test]
    fn a_file_that_makes_no_sense_is_refused_without_showing_a_key() {
        for text in [
            "[a]\nkey = 'short'",
            "[a]\nkey = 'has a space in the middle'",
            "[a]\nkee = 'cccccccccccccccccccccc'",
            "secretsecretsecret",
        ] {
            let error = Keys::open(file(text).path(), 0.0).map(drop).unwrap_err().to_string();
            assert!(!error.contains("secret") && !error.contains("ccccc"), "{error}");
        }
    }

    #[test]
    fn who_asks_too_often_is_told_when_to_come_again() {
        let caller = Caller::anybody(2.0);
        let found: Vec<_> = (0..4).map(|_| caller.count()).collect();
        assert_eq!(found, [Ok(()), Ok(()), Err(1), Err(1)]);
        assert!((0..100).all(|_| Caller::anybody(0.0).count().is_ok()));
    }
}
