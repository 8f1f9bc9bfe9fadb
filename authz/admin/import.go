package admin

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"keyward/authz/apikey"
)

// MaxImport is how many keys one batch may have. Every other change waits for it: about a millisecond a key.
const MaxImport = 500

// ImportedBy begins the CreatedBy of keys that were imported. The rates of creation do not count them.
const ImportedBy = "import by "

// An ImportInput is one key to import, as people write it: what a new key is to be, and the secret that its
// holder has already.
type ImportInput struct {
	KeyInput
	ID        string          `json:"id,omitempty" format:"uuid" doc:"Any UUID. Absent: a new one."`
	Secret    string          `json:"secret,omitempty" doc:"What the holder of the key sends: of our own format, or of a foreign shape that the server's configuration registers. Our prefix says the type, and an Agent Access Token its instance, agent and id. Never kept, and in no answer."`
	SHA256    string          `json:"sha256,omitempty" pattern:"^[0-9A-Fa-f]{64}$" doc:"Instead of a foreign secret: its SHA-256, in hexadecimal digits."`
	Argon2ID  *AgentHashInput `json:"argon2id,omitempty" doc:"Instead of the secret of an Agent Access Token: the hash that the application keeps of it. id and agentName are needed, as the token has them."`
	CreatedAt string          `json:"createdAt,omitempty" doc:"RFC 3339 with a zone, or a date, which means its beginning in UTC. Absent: now. The policy's longest life counts from the import."`
	Disabled  bool            `json:"disabled,omitempty"`
}

// An AgentHashInput is what FoundationaLLM keeps of an Agent Access Token, as it keeps it: base58.
type AgentHashInput struct {
	Salt       string `json:"salt" doc:"16 bytes in base58."`
	Hash       string `json:"hash" doc:"128 bytes in base58."`
	Parameters string `json:"parameters,omitempty" doc:"Memory in KiB, iterations and parallelism. By default, and at present always, m=8192,t=40,p=16."`
}

// An ImportRow is one row of what is imported.
type ImportRow struct {
	Number int // as reports name it
	Input  ImportInput
	Bad    error // why it could not be read; Input says nothing then
}

// An ImportStatus is what became of a row.
type ImportStatus string

// The statuses of rows.
const (
	RowImported ImportStatus = "imported" // the key is there now; in a dry run: would be
	RowExisting ImportStatus = "existing" // a key of the instance has this secret already: nothing was done
	RowRefused  ImportStatus = "refused"  // it cannot be imported
	RowHeld     ImportStatus = "held"     // nothing is wrong with it, but with another row of the batch
)

// An ImportedRow says what became of a row.
type ImportedRow struct {
	Number int
	Status ImportStatus
	KeyID  apikey.ID // zero where there is no key
	Err    error     // why it was refused
}

// An Import says what became of a batch.
type Import struct {
	Done bool // every row is imported or was there before; in a dry run: would be
	Rows []ImportedRow
}

// ImportKeys makes keys of secrets that their holders have already: all of a batch in one transaction, or,
// if one of them is refused, none. The caps are judged as for new keys, the creation rate is not. A row
// whose secret a key of the instance has already changes nothing, so a batch may be repeated. A dry run
// judges everything and keeps nothing.
//
// Errors: those that concern the batch as a whole; what is wrong with a row is in its Err:
// *apikey.InvalidError, *ForbiddenError, *QuotaExceededError, *StateError, several joined.
func (s *Service) ImportKeys(ctx context.Context, caller Caller, instanceID string, rows []ImportRow, dryRun bool) (Import, error) {
	id, err := caller.mayIn(instanceID, importKeys)
	if err != nil {
		return Import{}, err
	}
	switch {
	case len(rows) == 0:
		return Import{}, apikey.Invalid("", "there is no row to import")
	case len(rows) > MaxImport:
		return Import{}, apikey.Invalid("", fmt.Sprintf("has more than %d rows: import them in several batches", MaxImport))
	}
	if _, err := s.store.Instance(ctx, id); err != nil {
		return Import{}, err // before hundreds of digests
	}
	proofs := make([]proof, len(rows))
	for i := range rows {
		if rows[i].Bad == nil {
			proofs[i] = s.proofOf(&rows[i].Input)
		}
	}
	var done Import
	rev, err := s.update(ctx, func(ctx context.Context, tx Tx) error {
		instance, err := tx.Instance(ctx, id)
		if err != nil {
			return err
		}
		b := importing{s: s, caller: caller, tx: tx, instance: instance, policy: instance.Policy.InForce(), at: now(), rowOf: map[apikey.Digest]int{}}
		if done, err = b.all(ctx, rows, proofs); err != nil {
			return err
		}
		if dryRun || !done.Done || b.made == 0 {
			return errNothing // and nothing is kept
		}
		return nil
	})
	switch {
	case errors.Is(err, errNothing):
		return done, nil
	case err != nil:
		return Import{}, err
	}
	s.propagate(ctx, rev, createWait)
	return done, nil
}

// A proof is what a row says of the secret: how the key is found.
type proof struct {
	typ     apikey.Type        // that the secret itself names; "": none
	token   *apikey.AgentToken // that the secret is; nil: it is none
	hint    string
	digests []apikey.Digest   // under the current pepper, and during a rotation the previous one
	hash    *apikey.AgentHash // instead of digests; nil: there are those
	err     error
}

func (s *Service) proofOf(in *ImportInput) proof {
	if in.Argon2ID != nil {
		return s.proofOfHash(in)
	}
	if in.SHA256 != "" {
		return s.proofOfSHA256(in)
	}
	if in.Secret == "" {
		return proof{err: apikey.Invalid("secret", "is missing: give it, or sha256 or argon2id")}
	}
	kind, err := s.cfg.Format.Check(in.Secret)
	switch {
	case errors.Is(err, apikey.ErrChecksum):
		return proof{err: apikey.Invalid("secret", "has a wrong checksum: it was mistyped or cut")}
	case err != nil:
		return proof{err: apikey.Invalid("secret", "has not the shape of a key")}
	case kind == apikey.KindManagement:
		return proof{err: apikey.Invalid("secret", "is a management token, not a key")}
	}
	p := proof{typ: typeOf(kind), hint: s.cfg.Format.Hint(apikey.NewSecret(in.Secret))}
	if kind == apikey.KindForeign {
		if token, err := apikey.ParseAgentToken(in.Secret); err == nil {
			p.typ, p.token = apikey.TypeAgent, &token
		}
	}
	p.digests = s.digests(func(pepper *apikey.Pepper) apikey.Digest { return pepper.DigestOf(kind, in.Secret) })
	return p
}

// proofOfSHA256 is the proof of a foreign secret that only its holder knows.
func (s *Service) proofOfSHA256(in *ImportInput) proof {
	sum, err := hex.DecodeString(in.SHA256)
	switch {
	case in.Secret != "":
		return proof{err: apikey.Invalid("sha256", "does not go with secret: give one of them")}
	case err != nil || len(sum) != sha256.Size:
		return proof{err: apikey.Invalid("sha256", "must be 64 hexadecimal digits")}
	case len(s.cfg.Format.Foreign) == 0:
		return proof{err: apikey.Invalid("sha256", "is of no use: the server's configuration registers no foreign shape (credentials.foreign), so it would know no such secret")}
	}
	return proof{digests: s.digests(func(pepper *apikey.Pepper) apikey.Digest { return pepper.DigestSHA256([sha256.Size]byte(sum)) })}
}

// proofOfHash is the proof of an Agent Access Token that only its holder knows, and that no digest finds
// before its holder comes.
func (s *Service) proofOfHash(in *ImportInput) proof {
	hash, err := apikey.ParseAgentHash(in.Argon2ID.Salt, in.Argon2ID.Hash)
	bad, isBad := errors.AsType[*apikey.InvalidError](err)
	p := proof{typ: apikey.TypeAgent, hash: &hash}
	switch {
	case in.Secret != "" || in.SHA256 != "":
		p.err = apikey.Invalid("argon2id", "does not go with secret or sha256: give one of them")
	case isBad:
		p.err = apikey.Invalid("argon2id."+bad.Field, bad.Reason)
	case in.Argon2ID.Parameters != "" && in.Argon2ID.Parameters != AgentHashParameters:
		p.err = apikey.Invalid("argon2id.parameters", "must be "+AgentHashParameters+": a hash with others is not one of FoundationaLLM's")
	case !slices.Contains(s.cfg.Format.Foreign, apikey.Shape{AgentToken: true}):
		p.err = apikey.Invalid("argon2id", "is of no use: the server's configuration does not register Agent Access Tokens (credentials.foreign), so it would know none")
	case in.ID == "":
		p.err = apikey.Invalid("id", "is missing: it is part of the token")
	}
	return p
}

// digests are those under the current pepper and, during a rotation, the previous one.
func (s *Service) digests(under func(*apikey.Pepper) apikey.Digest) []apikey.Digest {
	all := []apikey.Digest{under(s.cfg.Peppers.Current)}
	if s.cfg.Peppers.Previous != nil {
		all = append(all, under(s.cfg.Peppers.Previous))
	}
	return all
}

// typeOf is the type of keys whose secrets have a kind.
func typeOf(kind apikey.Kind) apikey.Type {
	for _, t := range []apikey.Type{apikey.TypeInstance, apikey.TypeAgent, apikey.TypeUser} {
		if t.Kind() == kind {
			return t
		}
	}
	return ""
}

// importing is one batch in its transaction.
type importing struct {
	s        *Service
	caller   Caller
	tx       Tx
	instance *apikey.Instance
	policy   apikey.Policy // in force
	at       time.Time
	rowOf    map[apikey.Digest]int // of the batch, by number
	made     int
}

// all imports every row that can be. Errors are those that end the transaction.
func (b *importing) all(ctx context.Context, rows []ImportRow, proofs []proof) (Import, error) {
	done := Import{Done: true, Rows: make([]ImportedRow, len(rows))}
	for i := range rows {
		to := &done.Rows[i]
		to.Number = rows[i].Number
		to.Status, to.KeyID, to.Err = b.one(ctx, &rows[i], &proofs[i])
		if to.Err == nil {
			continue
		}
		if !refusesRow(to.Err) {
			return Import{}, to.Err
		}
		to.Status, done.Done = RowRefused, false
	}
	if done.Done {
		return done, nil
	}
	for i := range done.Rows {
		if to := &done.Rows[i]; to.Status == RowImported {
			to.Status, to.KeyID = RowHeld, apikey.ID{}
		}
	}
	return done, nil
}

// refusesRow reports whether an error is about a row, and not about the store.
func refusesRow(err error) bool {
	if many, ok := err.(interface{ Unwrap() []error }); ok { // of faults: all of one sort
		return refusesRow(many.Unwrap()[0])
	}
	_, invalid := errors.AsType[*apikey.InvalidError](err)
	_, forbidden := errors.AsType[*ForbiddenError](err)
	_, full := errors.AsType[*QuotaExceededError](err)
	_, state := errors.AsType[*StateError](err)
	return invalid || forbidden || full || state
}

// one imports one row.
func (b *importing) one(ctx context.Context, row *ImportRow, p *proof) (ImportStatus, apikey.ID, error) {
	if row.Bad != nil {
		return RowRefused, apikey.ID{}, row.Bad
	}
	k, err := b.key(&row.Input, p)
	if err != nil {
		return RowRefused, apikey.ID{}, err
	}
	digests, same := p.digests, "secret"
	if p.hash != nil {
		digests, same = []apikey.Digest{k.ID.PendingDigest()}, "id"
	}
	digest := digests[0]
	if other, twice := b.rowOf[digest]; twice {
		return RowRefused, apikey.ID{}, apikey.Invalid(same, "is that of row "+strconv.Itoa(other)+" too")
	}
	b.rowOf[digest] = row.Number
	if p.hash != nil {
		switch there, err := b.thereByHash(ctx, k, p.hash); {
		case err != nil:
			return RowRefused, apikey.ID{}, err
		case there:
			return RowExisting, k.ID, nil
		}
	}
	for _, d := range p.digests {
		found, _, err := b.tx.FindKey(ctx, d)
		switch {
		case isNotFound(err):
			continue
		case err != nil:
			return RowRefused, apikey.ID{}, err
		case found.InstanceID != b.instance.ID || (row.Input.ID != "" || p.token != nil) && found.ID != k.ID:
			return RowRefused, apikey.ID{}, &StateError{"another key has this secret"}
		}
		return RowExisting, found.ID, nil
	}
	if err := withinCaps(ctx, b.tx, k, b.policy.Caps, 1, b.at); err != nil {
		return RowRefused, apikey.ID{}, err
	}
	if err := b.tx.InsertKey(ctx, k); errors.Is(err, apikey.ErrConflict) {
		return RowRefused, apikey.ID{}, &StateError{"another key has this id"}
	} else if err != nil {
		return RowRefused, apikey.ID{}, err
	}
	if p.hash != nil {
		err = b.tx.InsertPending(ctx, k.ID, k.Generations[0], *p.hash)
	} else {
		err = b.tx.InsertGeneration(ctx, k.ID, k.Generations[0], digest, b.s.cfg.Peppers.Current.Version())
	}
	if err != nil {
		return RowRefused, apikey.ID{}, err
	}
	b.made++
	return RowImported, k.ID, b.caller.audit(ctx, b.tx, importKeys, b.instance.ID, k.ID.String(), nil, auditOf(k))
}

// thereByHash reports whether a token that is imported by its hash is there. Once its holder has come, or if it
// was imported itself, nothing is left to compare the hash with: then it is there if the key with its id is one
// that was imported for the same agent.
func (b *importing) thereByHash(ctx context.Context, k *apikey.Key, hash *apikey.AgentHash) (bool, error) {
	found, err := b.tx.Key(ctx, b.instance.ID, k.ID)
	switch {
	case isNotFound(err):
		return false, nil
	case err != nil:
		return false, err
	case found.Type != apikey.TypeAgent || found.AgentName != k.AgentName || !strings.HasPrefix(found.CreatedBy, ImportedBy):
		return false, &StateError{"another key has this id"}
	}
	switch kept, err := b.tx.AgentHash(ctx, k.ID); {
	case isNotFound(err):
		return true, nil
	case err != nil:
		return false, err
	case kept != *hash:
		return false, &StateError{"the key with this id was imported with another hash"}
	}
	return true, nil
}

// key checks a row and makes the key that it describes.
func (b *importing) key(in *ImportInput, p *proof) (*apikey.Key, error) {
	var bad faults
	bad.add(p.err)
	input := in.KeyInput
	switch {
	case input.Type == "":
		input.Type = p.typ
	case p.typ != "" && input.Type != p.typ:
		bad.add(apikey.Invalid("type", "is not the one that the secret says"))
	}
	id := in.ID
	if t := p.token; t != nil {
		// What the token says of itself is what the row says, or the row is about another one.
		for _, own := range []struct {
			field, says string
			to          *string
		}{{"agentName", t.AgentName, &input.AgentName}, {"id", t.KeyID.String(), &id}} {
			if *own.to != "" && !strings.EqualFold(*own.to, own.says) {
				bad.add(apikey.Invalid(own.field, "is not the one that the token names"))
			}
			*own.to = own.says
		}
		if t.InstanceID != b.instance.ID {
			bad.add(apikey.Invalid("secret", "is a token of another instance"))
		}
	}
	k, err := input.key(b.s.cfg.Format, &b.policy, b.at)
	if err != nil {
		bad = append(bad, err)
	}
	bad.add(overrides(b.instance.Quotas, k.Type, k.Quotas))
	if k.ID = newID(); id != "" {
		if k.ID, err = apikey.ParseID(id); err != nil || k.ID.IsZero() {
			bad.add(apikey.Invalid("id", "must be a UUID such as 0192f0c1-8a4e-7cc3-98c4-dc0c0c07398f"))
		}
	}
	if in.CreatedAt != "" {
		created, _, err := parseTime("createdAt", in.CreatedAt)
		switch {
		case err != nil:
			bad.add(err)
		case created.After(b.at.Add(clockSkew)):
			bad.add(apikey.Invalid("createdAt", "must not be in the future"))
		case created.Before(b.at):
			// Nothing is known here of what it was used for before: idleness counts from now.
			k.CreatedAt, k.IdleFrom = created, b.at
		}
	}
	if err := bad.err(); err != nil {
		return nil, err
	}
	k.InstanceID, k.CreatedBy, k.Disabled = b.instance.ID, ImportedBy+b.caller.Name, in.Disabled
	k.Generations = []apikey.Generation{{Number: 1, Hint: p.hint, CreatedAt: k.CreatedAt}}
	return k, nil
}

// ExportKeys calls yield with every key of an instance, the oldest first, until it returns false. No secret
// and no digest is part of a key. That somebody exported them is in the audit before the first.
func (s *Service) ExportKeys(ctx context.Context, caller Caller, instanceID string, yield func(*apikey.Key) bool) error {
	id, err := caller.mayIn(instanceID, exportKeys)
	if err != nil {
		return err
	}
	_, err = s.update(ctx, func(ctx context.Context, tx Tx) error {
		if _, err := tx.Instance(ctx, id); err != nil {
			return err
		}
		return caller.audit(ctx, tx, exportKeys, id, "", nil, nil)
	})
	if err != nil {
		return err
	}
	query := KeyQuery{Order: OrderOldest, Limit: exportPage, Now: now()}
	for {
		page, err := s.store.Keys(ctx, id, query)
		if err != nil {
			return err
		}
		for _, k := range page {
			if !yield(k) {
				return nil
			}
		}
		if len(page) < query.Limit {
			return nil
		}
		query.After = query.Order.PlaceOf(page[len(page)-1])
	}
}

const exportPage = 500
