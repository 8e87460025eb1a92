//! Pictures that were looked at once, to be asked about many times by the name that whoever sent them got.

use std::time::Duration;

use moka::sync::Cache;

use super::config::CacheConfig;
use crate::engine::Sight;

/// What was made of pictures, in bounded memory. A name that was not used for a while is forgotten.
pub struct Images {
    seen: Cache<String, Image>,
    /// Seconds that a name is good for after it was used.
    pub lives_s: f64,
}

/// A picture that was looked at.
#[derive(Clone)]
pub struct Image {
    /// Who sent it; nobody else may ask about it.
    pub owner: u64,
    /// The model that looked.
    pub model: String,
    /// What it made of it.
    pub sight: Sight,
}

impl Images {
    /// An empty store.
    pub fn new(config: &CacheConfig) -> Self {
        let weigh = |_: &String, image: &Image| u32::try_from(image.sight.n_bytes()).unwrap_or(u32::MAX);
        let lives = Duration::from_secs_f64(config.images_s);
        let seen = Cache::builder().max_capacity(config.images_bytes).weigher(weigh).time_to_idle(lives).build();
        Self { seen, lives_s: config.images_s }
    }

    /// Keeps a picture under a new name, which cannot be guessed.
    pub fn keep(&self, image: Image) -> String {
        let id = format!("img-{:032x}", rand::random::<u128>());
        self.seen.insert(id.clone(), image);
        id
    }

    /// A picture of this caller.
    pub fn get(&self, owner: u64, id: &str) -> Option<Image> {
        self.seen.get(id).filter(|image| image.owner == owner)
    }

    /// Forgets a picture of this caller; false if there is none.
    pub fn forget(&self, owner: u64, id: &str) -> bool {
        // Another's picture stays.
        let is_there = self.get(owner, id).is_some();
        if is_there {
            self.seen.invalidate(id);
        }
        is_there
    }
}
