package portal

import (
	"net/http"
	"strings"
	"time"

	"github.com/google/uuid"

	"keyward/authz/admin"
	"keyward/authz/apikey"
)

// tokenPages registers the management tokens that may do something in an instance.
func (p *portal) tokenPages() {
	const at, section = "/instances/{instance}", "Tokens"
	p.page(section, "GET "+at+"/tokens", p.tokens)
	p.page(section, "GET "+at+"/new-token", p.newToken)
	p.page(section, "POST "+at+"/new-token", p.createToken)
	p.page(section, "GET "+at+"/tokens/{token}/revoke", p.askRevokeToken)
	p.page(section, "POST "+at+"/tokens/{token}/revoke", p.revokeToken)
}

// A tokenRow is a token in the list.
type tokenRow struct {
	admin.TokenRecord
	Own bool // who asks is signed in with it
}

func (p *portal) tokens(w http.ResponseWriter, v *visit) error {
	list, err := p.tokenRows(v)
	if err != nil {
		return err
	}
	return p.show(w, v, "tokens", "Management tokens", list)
}

// tokenRows are the tokens that the caller sees and that may do something in the instance, those that work first.
func (p *portal) tokenRows(v *visit) ([]tokenRow, error) {
	all, err := p.svc.Tokens(v.Context(), v.Caller)
	if err != nil {
		return nil, err
	}
	if _, err := p.svc.Instance(v.Context(), v.Caller, v.Instance); err != nil { // another's, or none
		return nil, err
	}
	var working, over []tokenRow
	for _, t := range all {
		if t.InstanceID != "" && t.InstanceID != v.Instance {
			continue
		}
		row := tokenRow{admin.TokenRecordOf(t, time.Now()), v.Caller.Name == "token:"+t.ID.String()}
		if row.Status == "active" {
			working = append(working, row)
		} else {
			over = append(over, row)
		}
	}
	return append(working, over...), nil
}

// A tokenView is the form for a token.
type tokenView struct {
	Fields fieldList
	Faults []fault
	Once   string
}

func tokenFields(v *visit, in admin.TokenInput) fieldList {
	places := []choice{{v.Instance, "this instance only"}}
	if v.Caller.InstanceID == "" {
		places = append(places, choice{"", "all instances"})
	}
	return fieldList{
		{Name: "name", Label: "Name", Kind: "text", Value: in.Name, Required: true, Max: 128, Help: "What it is for, such as: deployment pipeline."},
		{Name: "role", Label: "Role", Kind: "choice", Value: string(in.Role), Choices: []choice{
			{string(admin.RoleAuditor), "auditor: looks at everything, changes nothing"},
			{string(admin.RoleOperator), "operator: makes and changes keys, quotas and policy"},
			{string(admin.RoleOwner), "owner: everything, tokens too"},
			{string(admin.RoleUser), "user: makes and changes the keys of one person"},
		}},
		{Name: "instanceId", Label: "For", Kind: "choice", Value: in.InstanceID, Choices: places},
		{Name: "userPrincipalName", Label: "User principal name", Kind: "text", Value: in.UserPrincipalName,
			Help: "For the role user only: whose keys its holder sees and makes."},
		{Name: "expiresIn", Label: "Expires in", Kind: "text", Value: in.ExpiresIn, Max: 16, Empty: "never", Help: "A duration such as 90d, at most 365d."},
	}
}

func (p *portal) newToken(w http.ResponseWriter, v *visit) error {
	if !v.Can("token.create") {
		return &admin.ForbiddenError{Reason: "the role " + string(v.Caller.Role) + " has no right to token.create"}
	}
	if _, err := p.svc.Instance(v.Context(), v.Caller, v.Instance); err != nil {
		return err
	}
	in := admin.TokenInput{Role: admin.RoleOperator, InstanceID: v.Instance, ExpiresIn: "90d"}
	return p.show(w, v, "token", "New management token", tokenView{Fields: tokenFields(v, in), Once: uuid.NewString()})
}

func (p *portal) createToken(w http.ResponseWriter, v *visit) error {
	caller, bad := callerOnce(v)
	if bad != nil && v.Can("token.create") { // whoever cannot is told that, and the audit as well
		return bad
	}
	form := func(name string) string { return strings.TrimSpace(v.PostForm.Get(name)) }
	in := admin.TokenInput{
		Name: form("name"), Role: admin.Role(form("role")), InstanceID: form("instanceId"), ExpiresIn: form("expiresIn"), UserPrincipalName: form("userPrincipalName"),
	}
	var err error
	if in.InstanceID != "" && in.InstanceID != v.Instance { // the form offers no other
		err = apikey.Invalid("instanceId", "must be this instance, or all of them")
	}
	var made admin.CreatedToken
	if err == nil {
		made, err = p.svc.CreateToken(v.Context(), caller, in)
	}
	if faults, rest := faultsOf(err); err != nil {
		if len(rest) > 0 {
			return err
		}
		data := tokenView{Fields: tokenFields(v, in), Once: uuid.NewString()}
		data.Faults = data.Fields.blame(faults, "")
		return p.showAs(w, v, statusOf(err), "token", "New management token", data)
	}
	return p.showToken(w, v, made)
}

// A tokenSecretView is the one page that shows a token's secret.
type tokenSecretView struct {
	Token  admin.TokenRecord
	Secret string
	File   string // name to save it under
}

// showToken answers with a secret, here and nowhere else.
func (p *portal) showToken(w http.ResponseWriter, v *visit, made admin.CreatedToken) error {
	w.Header().Set("Cache-Control", "no-store, max-age=0")
	w.Header().Set("Pragma", "no-cache")
	return p.show(w, v, "tokensecret", "Token created", tokenSecretView{
		Token: admin.TokenRecordOf(made.Token, time.Now()), Secret: made.Secret.Reveal(), File: fileName(made.Token.Name),
	})
}

func (p *portal) askRevokeToken(w http.ResponseWriter, v *visit) error {
	row, err := p.tokenRow(v)
	if err != nil {
		return err
	}
	return p.show(w, v, "tokenrevoke", "Revoke management token", row)
}

func (p *portal) tokenRow(v *visit) (tokenRow, error) {
	list, err := p.tokenRows(v)
	if err != nil {
		return tokenRow{}, err
	}
	for _, row := range list {
		if row.ID.String() == v.PathValue("token") {
			return row, nil
		}
	}
	return tokenRow{}, apikey.ErrNotFound
}

func (p *portal) revokeToken(w http.ResponseWriter, v *visit) error {
	row, err := p.tokenRow(v) // of this instance's, as the page says
	if err != nil {
		return err
	}
	if _, err := p.svc.RevokeToken(v.Context(), v.Caller, row.ID); err != nil {
		return err
	}
	return p.done(w, v, v.Path("tokens"), "The token "+row.Name+" is revoked, at once.")
}
